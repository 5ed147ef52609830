"""Operations of a running server: signals, and bundles that are loaded again."""
