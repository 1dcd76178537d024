"""The runs under a directory: listed, compared, followed, and served to a browser. Reads; writes nothing."""
