"""Sans-io parts: the GGUF header, the shape of a model, its memory need, its source."""
