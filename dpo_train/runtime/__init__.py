"""Everything that knows Ray.

session.ray_session: start Ray or attach to it        executor.RayExecutor: what stages ask for
data_job: Ray Data     rank_job: Ray Train     sweep_job: Ray Tune     failures: retry or raise
"""
