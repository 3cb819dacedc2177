"""The demo: a real small chat model, real conversations, and the whole way from `helm install` to an adapter."""
