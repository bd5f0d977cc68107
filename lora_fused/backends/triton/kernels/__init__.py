"""Device code, one file per operation. Nothing here knows about torch."""
