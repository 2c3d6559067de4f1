"""Studies: a question, many runs, means with intervals, a report. From Python, as the console does it:

    from transformer_vq.studies.plan import load_study
    from transformer_vq.studies.report import write_report
    from transformer_vq.studies.run import run_study

    study = load_study("studies/estimators-tiny")
    run_study(study, at_once=2)
    write_report(study)

Nothing is imported here: a worker needs neither pandas nor matplotlib.
"""
