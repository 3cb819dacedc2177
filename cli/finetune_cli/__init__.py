"""The `finetune` command, also found by kubectl as `kubectl finetune`."""
