"""Adapter to the Kubernetes API: raw JSON in and out, watches that heal, a queue, a lease, events."""
