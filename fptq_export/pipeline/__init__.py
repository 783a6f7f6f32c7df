"""The pipeline: the only room that knows every stage and their order."""
