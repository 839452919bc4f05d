"""A laptop-sized Kubernetes and object store, to try mend with no cluster and to test it with real faults."""
