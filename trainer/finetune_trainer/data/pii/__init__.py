"""Find personal data and secrets in texts, one family of recognisers a file; `find` has the table of them all."""
