"""How tiny-llava is made: `python -m ocvtp.vlms.tiny train`."""
