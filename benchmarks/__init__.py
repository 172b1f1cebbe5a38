"""Speed of rewritten layers and models against compiled dense ones: ``python -m benchmarks list``."""
