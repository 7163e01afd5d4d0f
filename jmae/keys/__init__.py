"""The recipe keys of the systems, in modules that import no JAX: a wrong key or value is refused before it is imported.

The keys of the system NAME are in `jmae.keys.NAME`. The other modules have keys that several systems share.
"""
