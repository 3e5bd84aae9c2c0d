"""Give MLflow's server the accounts of a folder, and remove the others.

    python accounts.py FOLDER

FOLDER holds a file per account, called ROLE.NAME, whose text is the password: a Secret, mounted as a volume. The
environment has the server's address and its administrator, as for any client of MLflow (MLFLOW_TRACKING_URI,
MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD). Run it again after each change of the folder; it changes only what
differs, except that it sets every password.

MLflow lets every account read what nobody denies it (`default_permission` in basic_auth.ini), and gives whoever creates
something all rights to it; so what may be changed is created here, by the administrator.
"""

import os
import sys
from pathlib import Path

MODEL = "uni-vigu"
RUNS, LEDGER = "uni-vigu", "uni-vigu/promotions"  # the experiments of runs and of decisions
WORKSPACE = "default"  # of a server without workspaces
ROLES = {  # role -> (kind, name) -> permission, beside reading
    "read": {},
    "runs": {("experiment", RUNS): "EDIT"},
    # MANAGE: a lock is a run that is deleted when it is released
    "registry": {("experiment", RUNS): "EDIT", ("experiment", LEDGER): "MANAGE", ("registered_model", MODEL): "EDIT"},
}


def main(folder):
    """Make the accounts of `folder`; a mistake of its user's prints one sentence, and the exit code is 1."""
    server, administrator = os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_TRACKING_USERNAME"]
    wanted = read_accounts(folder, administrator)
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

    accounts = AuthServiceClient(server)
    roles = make_roles(accounts, make_resources(MlflowClient(server)))
    for name, (role, password) in wanted.items():
        set_account(accounts, name, password)
        held = {each.id for each in accounts.list_user_roles(name)} & set(roles.values())
        for other in held - {roles[role]}:
            accounts.unassign_role(name, other)
        if roles[role] not in held:
            accounts.assign_role(name, roles[role])
        print(f"{name}: {role}")
    for name in strangers(accounts, wanted):
        accounts.delete_user(name)
        print(f"{name}: removed")


def read_accounts(folder, administrator):
    """{name: (role, password)} of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not files:
        sys.exit(f"accounts: {folder} has no file; it must hold one for each account, called ROLE.NAME.")
    accounts = {}
    for path in files:
        role, _, name = path.name.partition(".")
        password = path.read_text(encoding="utf-8").strip()
        if role not in ROLES or not name:
            sys.exit(f"accounts: {path.name} must be called ROLE.NAME; the roles are {', '.join(ROLES)}.")
        if not password:
            sys.exit(f"accounts: {path.name} is empty; it must hold the account's password.")
        if name in accounts or name == administrator:
            sys.exit(f"accounts: {name} is there twice; give each account one role, and the administrator none.")
        accounts[name] = (role, password)
    return accounts


def make_resources(client):
    """Create what the roles name, as far as it is missing; returns their ids, as MLflow's permissions name them."""
    ids = {("registered_model", MODEL): MODEL}
    for name in (RUNS, LEDGER):
        found = client.get_experiment_by_name(name)
        ids["experiment", name] = found.experiment_id if found else client.create_experiment(name)
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    return ids


def make_roles(accounts, ids):
    """Give each role its permissions and no other; returns the roles' ids by name."""
    known = {role.name: role.id for role in accounts.list_roles(WORKSPACE)}
    for name, permissions in ROLES.items():
        if name not in known:
            known[name] = accounts.create_role(WORKSPACE, name).id
        wanted = {(kind, ids[kind, target]): permission for (kind, target), permission in permissions.items()}
        for each in accounts.list_role_permissions(known[name]):
            if wanted.get((each.resource_type, each.resource_pattern)) == each.permission:
                del wanted[each.resource_type, each.resource_pattern]
            else:
                accounts.remove_role_permission(each.id)
        for (kind, pattern), permission in wanted.items():
            accounts.add_role_permission(known[name], kind, pattern, permission)
    return {name: known[name] for name in ROLES}


def set_account(accounts, name, password):
    """Create an account, or set its password."""
    from mlflow.exceptions import MlflowException

    try:
        accounts.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        accounts.update_user_password(name, password)


def strangers(accounts, wanted):
    """The names of accounts that are neither wanted nor an administrator's."""
    from mlflow.server.auth.routes import LIST_USERS

    listed = accounts._request(LIST_USERS, "GET")["users"]  # the client has no method for it (MLflow 3.17.2)
    return sorted(one["username"] for one in listed if not one["is_admin"] and one["username"] not in wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
