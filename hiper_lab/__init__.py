"""hiper_lab: a research workbench for hierarchical reinforcement learning of LLM agents.

Read it in the order of the data flow: scan, grid, flat, credit, protocol, trajectory, envs, policy,
sampling, rollout, objective, train; then figures and runs. Import what you need from its module.
"""

__version__ = "0.1.0"
