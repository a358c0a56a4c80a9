"""Models as files and signatures: folder, model.toml, validation, batching; loads nothing."""
