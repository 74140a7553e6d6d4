"""Analysis room: run folders in; data frames, statistics, figures and one HTML report out.

`load_study(path)` reads the files, `summarize(study)` is the table of arms, `claims_table(study)`
the verdicts on the GSPO paper's claims, and `write_report(path)` draws everything again from files.
Needs pandas, numpy and matplotlib; never torch, transformers or the trainer.
"""

from moe_rl.analysis.claims import claims_table
from moe_rl.analysis.load import AnalysisError, AnalysisWarning, Study, load_study
from moe_rl.analysis.measures import run_measures, summarize, terminal_table
from moe_rl.analysis.report import write_report

__all__ = [
    "AnalysisError",
    "AnalysisWarning",
    "Study",
    "claims_table",
    "load_study",
    "run_measures",
    "summarize",
    "terminal_table",
    "write_report",
]
