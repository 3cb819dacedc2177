"""Benchmarks. Each table in results/ is written by one command, with its reference measured in the same run."""
