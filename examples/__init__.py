"""Scripts to copy, and the small bundled model."""
