"""Adapting the default model to medical pictures: one YAML file, one command."""
