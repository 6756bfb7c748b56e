"""`vae-ds bench gpu`."""
