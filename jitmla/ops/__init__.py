"""One module per op: its contract, its argument checks, its Spec and its launch. Importing an op imports torch."""
