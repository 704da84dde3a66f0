"""How examples are written down: one file per format, each a source of records."""
