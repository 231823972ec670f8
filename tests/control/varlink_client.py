"""An independent client (the PyPI package varlink) against keepd's control socket. usage: varlink_client.py unix:/path"""
import sys

import varlink

with varlink.Client.new_with_address(sys.argv[1]) as client:
    with client.open("org.varlink.service") as service:
        info = service.GetInfo()
        text = service.GetInterfaceDescription(interface="io.keepd.Control")["description"]
    assert "method StartBackup" in text
    assert info["product"] == "keepd", info
    assert "io.keepd.Control" in info["interfaces"], info
    with client.open("io.keepd.Control") as keepd:
        assert keepd.GetStatus()["status"]["jobs"][0]["name"] == "shop"
        assert [j["name"] for j in keepd.ListJobs()["jobs"]] == ["shop"]
        assert len(keepd.ListBackups()["backups"]) == 1
        run = keepd.StartBackup(job="shop")["run"]
        states = [r["run"]["state"] for r in keepd.FollowRun(run=run, _more=True)]
        assert states[-1] == "good", states
        paths = [e["path"]["path"] for r in keepd.ListEntries(backup="latest", recursive=True, _more=True) for e in r["entries"]]
        assert "db/shop.db" in paths and "files/deep/note.txt" in paths, paths
        try:
            keepd.ShowJob(job="nothing")
            raise SystemExit("an error was expected")
        except varlink.VarlinkError as e:
            assert e.as_dict()["error"] == "io.keepd.Control.NotFound", e
print("OK")
