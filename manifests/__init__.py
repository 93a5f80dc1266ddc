"""One TOML per release: where it lives, its licence, its published facts. Read by `zoo.manifest`; data only."""
