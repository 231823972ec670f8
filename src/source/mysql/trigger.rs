//! Triggers are kept as they were written. One that names its database cannot be brought into another one.

/// `CREATE TRIGGER db.name …` or `… ON db.table …`: the trigger's name.
pub fn tied(body: &str) -> Option<String> {
    let mut words = Words(body.get(position(body)?..)?);
    if !words.next()?.eq_ignore_ascii_case("trigger") {
        return None;
    }
    let mut name = words.next()?;
    if name.eq_ignore_ascii_case("if") {
        name = words.nth(2)?;
    }
    let mut next = words.next()?;
    if next == "." {
        return Some(format!("{name}.{}", words.next()?));
    }
    let mut seen = 0;
    while !next.eq_ignore_ascii_case("on") {
        next = words.next()?;
        seen += 1;
        if seen > 1000 {
            return None;
        }
    }
    words.next()?;
    (words.next()? == ".").then_some(name)
}

/// Where `TRIGGER` stands, behind who defined it.
fn position(body: &str) -> Option<usize> {
    let begin = body.find("/*!50003 CREATE*/").map(|at| at + "/*!50003 CREATE*/".len())?;
    let rest = body.get(begin..)?;
    // A definer is in backticks, in which anything may stand, but hardly this.
    let marker = "/*!50003 ";
    rest.find(marker).map(|at| begin + at + marker.len())
}

/// Words and names, without their quotes; anything else as single characters.
struct Words<'a>(&'a str);

impl Iterator for Words<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let text = self.0.trim_start();
        let first = text.chars().next()?;
        if first == '`' || first == '"' {
            let mut name = String::new();
            let mut rest = text.get(1..)?;
            loop {
                let (part, after) = rest.split_once(first)?;
                name.push_str(part);
                rest = after;
                match rest.strip_prefix(first) {
                    Some(after) => (name.push(first), rest = after).1,
                    None => break,
                }
            }
            self.0 = rest;
            return Some(name);
        }
        let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).unwrap_or(text.len()).max(first.len_utf8());
        let (word, rest) = text.split_at(end);
        self.0 = rest;
        Some(word.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trigger_that_names_its_database_is_found() {
        let written = |text: &str| format!(";\n/*!50003 CREATE*/ /*!50017 DEFINER=`root`@`localhost`*/ /*!50003 {text}\n*/;;\n");
        let of = |text: &str| tied(&written(text));
        assert_eq!(of("trigger shop.tr2 after insert on shop.child for each row set @x=1"), Some("shop.tr2".into()));
        assert_eq!(of("TRIGGER `a``b` . `t.x` BEFORE UPDATE ON child FOR EACH ROW SET @x = 1"), Some("a`b.t.x".into()));
        assert_eq!(of("TRIGGER tr BEFORE DELETE ON `shop`.`child` FOR EACH ROW SET @x = 1"), Some("tr".into()));
        assert_eq!(of("TRIGGER IF NOT EXISTS tr BEFORE DELETE\nON `ch.ild` FOR EACH ROW update shop.x set a = 1"), None);
        assert_eq!(of("TRIGGER `tr` BEFORE DELETE ON child FOR EACH ROW set new.a = 1"), None);
        assert_eq!(tied("CREATE DEFINER=`root`@`localhost` FUNCTION `f`(x int) RETURNS int(11)\nbegin return x+1; end\n;;"), None);
        assert_eq!(tied(""), None);
    }
}
