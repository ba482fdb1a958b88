"""Devices and hosts: the set-up before JAX starts, and how training is laid out over them."""
