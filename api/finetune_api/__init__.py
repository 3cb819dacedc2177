"""The contract between the operator, the trainer and the CLI: pydantic and the standard library only, no I/O."""
