"""transformers and PEFT: loading, saving, marking. Importing this package imports neither."""
