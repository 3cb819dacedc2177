"""Rows in object storage become tokens and labels; every row is accounted for. Never imports torch."""
