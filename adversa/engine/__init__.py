"""How work is carried out, without Ray: one interface, the engine of this process, tasks, worker
pool.
"""
