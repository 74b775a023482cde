"""The pipeline in reading order, and the public `plan` that joins the stages' plans.

ingest → tile → reference → propagate → embed → integrate
"""
