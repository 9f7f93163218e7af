"""A Ray cluster of several software-NPU nodes on one machine.

``manager`` is the interface: ``up``, ``down``, ``status``, ``node_command``.  As root every node is a set of Linux
namespaces (``namespaces``) with its own address, host name, process table and /dev/shm; otherwise nodes are several
raylets on 127.0.0.1 (``plain``).  ``plan`` holds what can be decided without touching the system.
"""
