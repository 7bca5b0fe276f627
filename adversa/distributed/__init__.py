"""Ray: the only package that imports it. `RayEngine` runs the same work as `LocalEngine` on a machine or a cluster."""
