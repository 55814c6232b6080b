"""Parameter counts on the papers' own configurations, beside what the papers print; needs no weights.

for row in count_rows(["lora"]):
    print(row.configuration, row.printed, row.counted, row.reproduces)
"""

from surgeon.counts.cases import CASES, Case
from surgeon.counts.counting import Row, count_rows, page, to_dict, verdict

__all__ = ["CASES", "Case", "Row", "count_rows", "page", "to_dict", "verdict"]
