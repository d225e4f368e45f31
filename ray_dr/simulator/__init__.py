"""A job's whole life in virtual time: the same machine as in a cluster, against faults drawn from a seed."""
