"""Ray's nodes, NPUs and placement groups: collected, checked, planned."""
