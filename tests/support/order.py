"""The order of imports within the package, for the test that holds it and the page that shows it."""

# One floor a line. Lower never imports higher, and neighbours on one floor never import each other.
ORDER = """
errors progress
_torch
accounting distributed
privacy graph clipping batchnorm
kernels options
noise capture batches
proof
norms
planning
rewriting lowering
pipeline
runtime
regions
module
reporting
optim
data experts extending losses rates schedules viz
api step checkpoint per_example
validating advising
private
auditing
integrations
__init__
"""
