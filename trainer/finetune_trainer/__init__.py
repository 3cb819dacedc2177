"""The trainer: prepare and train stages of one FineTuneJob, in a container or in local processes."""
