"""The daemon's JSON-RPC: SPDK's method names, parameters, results and error codes, on a Unix socket."""
