"""What other programs write for the same numbers, as hashes that were made once; and the scripts that made them."""
