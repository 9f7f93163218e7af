"""What runs on machines of a fleet and in pipelines, and is no part of the installed package."""
