"""What `make gpu` measures: `python -m bench.gpu`."""
