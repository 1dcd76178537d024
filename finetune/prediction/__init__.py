"""Labelling a file with a model: `reading` gives its rows, `trained` says what a model's directory holds, `model` runs
it, `writing` keeps what is done. What rows become stands in the task's family; in `vectors` where there is no task.
"""
