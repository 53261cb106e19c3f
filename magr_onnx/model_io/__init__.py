"""Model files in and out: loading, checks of hostile files, atomic writing."""
