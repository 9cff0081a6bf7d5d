"""Object storage against a real server of the S3 protocol, over HTTP, with faults between."""
