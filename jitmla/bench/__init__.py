"""`jitmla bench`: what a kernel takes on this GPU, beside peers and beside what the GPU can do at all.

    jitmla bench mla_decode [--peers] [--json FILE]      or: python -m jitmla.bench mla_decode ...

Results kept in docs/benchmarks/*.json become the page docs/benchmarks/README.md (`make docs`).
"""
