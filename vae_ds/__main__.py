"""`python -m vae_ds`, which is also how `deepspeed --module vae_ds` starts each rank."""

from vae_ds.cli import main

main()
