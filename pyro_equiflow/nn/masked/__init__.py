# SPDX-License-Identifier: Apache-2.0
"""Networks in which degrees decide which output sees which input."""
