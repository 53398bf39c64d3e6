"""Export a base and its prompt as one plain transformers model, or push a run to the hub."""
