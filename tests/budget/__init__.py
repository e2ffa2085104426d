"""What things may cost. Each figure is the best of several runs: noise only ever adds."""
