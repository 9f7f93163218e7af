"""Failure detection and orders: control server and client, exit sentinels, health check, timeouts."""
