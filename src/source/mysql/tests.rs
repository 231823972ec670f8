use proptest::prelude::*;

use super::dump_reader::{DumpReader, Summary};
use crate::source::dump::Table;

/// As MariaDB's tool prints it: one row on a line, a body between delimiters, a view, a table whose name and rows look like SQL.
const MARIADB: &str = r#"/*M!999999\- enable the sandbox mode */ 
-- MariaDB dump 10.19  Distrib 10.11.19-MariaDB, for debian-linux-gnu (x86_64)
--
-- Host: o'hara    Database: shop
-- ------------------------------------------------------
-- Server version	10.11.19-MariaDB-0+deb12u1

/*!40101 SET @OLD_CHARACTER_SET_CLIENT=@@CHARACTER_SET_CLIENT */;
/*!40101 SET @OLD_SQL_MODE=@@SQL_MODE, SQL_MODE='NO_AUTO_VALUE_ON_ZERO' */;

DROP SEQUENCE IF EXISTS `seq`;
CREATE SEQUENCE `seq` start with 10 minvalue 1 ENGINE=InnoDB;
DO SETVAL(`seq`, 1010, 0);

--
-- Table structure for table `account`
--

DROP TABLE IF EXISTS `account`;
CREATE TABLE `account` (
  `id` int(11) NOT NULL COMMENT 'it''s; `INSERT INTO `x` VALUES (1)',
  `note` text DEFAULT 'a\'b;',
  PRIMARY KEY (`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;

LOCK TABLES `account` WRITE;
/*!40000 ALTER TABLE `account` DISABLE KEYS */;
INSERT INTO `account` VALUES
(1,50,'it\'s \\ ) ( , ; -- x'),
(2,50,'line\nbreak \"x\" ` /* c */'),
(3,0,NULL);
INSERT INTO `account` VALUES
(4,-1.5e10,'''('),
(5,0x00FF27,'\\');
/*!40000 ALTER TABLE `account` ENABLE KEYS */;
UNLOCK TABLES;
/*!50003 SET sql_mode              = 'STRICT_TRANS_TABLES' */ ;
DELIMITER ;;
/*!50003 CREATE*/ /*!50017 DEFINER=`root`@`localhost`*/ /*!50003 trigger tr before insert on child for each row begin
INSERT INTO `account` VALUES (1),(2); -- it's
end 
*/;;
DELIMITER ;
/*!50003 SET sql_mode              = @saved_sql_mode */ ;

--
-- Table structure for table `empty`
--

CREATE TABLE `empty` (
  `id` int(11) DEFAULT NULL
) ENGINE=InnoDB;
/*!50001 CREATE VIEW `v` AS SELECT
 NULL AS `id` */;
CREATE TABLE IF NOT EXISTS `wei``rd (na.me;` (
  `id` int(11) DEFAULT NULL
) ENGINE=MyISAM;
INSERT INTO `wei``rd (na.me;` VALUES
(1,0x00FF27,'INSERT INTO `x` VALUES (1)',2,'{\"a\":[1,2]}'),
(2,'','',3,NULL);
DELIMITER ;;
/*!50003 CREATE*/ /*!50017 DEFINER=`root`@`localhost`*/ /*!50003 trigger shop.tr2 after insert on shop.child for each row set @x=1 
*/;;
DELIMITER ;
/*!50003 DROP PROCEDURE IF EXISTS `p` */;
DELIMITER ;;
CREATE DEFINER=`root`@`localhost` PROCEDURE `p`(x int)
begin
/*
DELIMITER ;
INSERT INTO `empty` VALUES (1);
*/
insert into empty values (x),(2); select '
DELIMITER ;
INSERT INTO `empty` VALUES (1);'; end
;;
DELIMITER ;
/*!50001 CREATE ALGORITHM=UNDEFINED */
/*!50013 DEFINER=`root`@`localhost` SQL SECURITY DEFINER */
/*!50001 VIEW `v` AS select '*/ INSERT INTO `empty` VALUES (1);' AS `x` from `account` `a` */;
/*!40111 SET SQL_NOTES=@OLD_SQL_NOTES */;

-- Dump completed
"#;

/// As Oracle's tool prints it: all rows on a line, columns named where some are generated.
const MYSQL: &str = r#"-- MySQL dump 10.13  Distrib 8.0.36, for Linux (x86_64)
--
-- Host: localhost    Database: shop
-- ------------------------------------------------------
-- Server version	8.0.36

/*!50503 SET NAMES utf8mb4 */;
DROP TABLE IF EXISTS `a`;
CREATE TABLE `a` (
  `id` int NOT NULL,
  `VALUES (` int GENERATED ALWAYS AS ((`id` + 1)) VIRTUAL
) ENGINE=InnoDB /*!80016 DEFAULT ENCRYPTION='N' */
/*!50100 PARTITION BY HASH (`id`) PARTITIONS 2 */;
INSERT INTO `a` (`id`, `VALUES (`, `v`) VALUES (1,_binary 'x),(\'',0xAA),(2,_binary '\0\Z''',NULL),(3,ST_GeomFromText('POINT(1 1)'),4);
INSERT  IGNORE INTO `b` VALUES (1),(2);
/*!50001 CREATE VIEW `v` AS SELECT 
 1 AS `id`*/;

-- Dump completed
"#;

fn read(text: &[u8], cuts: &[usize]) -> Result<Summary, String> {
    let mut reader = DumpReader::default();
    let mut from = 0;
    for cut in cuts.iter().copied().chain([text.len()]) {
        let to = cut.clamp(from, text.len());
        reader.feed(&text[from..to]);
        from = to;
    }
    reader.finish()
}

fn rows(summary: &Summary) -> Vec<(&str, u64)> {
    summary.tables.iter().map(|(name, t)| (name.as_str(), t.rows)).collect()
}

#[test]
fn rows_are_counted_and_what_looks_like_them_is_not() {
    let summary = read(MARIADB.as_bytes(), &[]).unwrap();
    assert_eq!(rows(&summary), [("account", 5), ("empty", 0), ("wei`rd (na.me;", 2)]);
    assert!(summary.understood);
    assert_eq!((summary.server_version.as_str(), summary.tool_version.as_str()), ("10.11.19-MariaDB-0+deb12u1", "10.11.19-MariaDB"));
    assert_eq!(summary.tied, ["shop.tr2"]);
    assert!(summary.tables["account"].bytes > 100 && summary.tables["empty"] == Table::default());
    let summary = read(MYSQL.as_bytes(), &[]).unwrap();
    assert_eq!(rows(&summary), [("a", 3), ("b", 2)]);
    assert!(summary.understood && summary.tied.is_empty());
    assert_eq!((summary.server_version.as_str(), summary.tool_version.as_str()), ("8.0.36", "8.0.36"));
}

#[test]
fn a_dump_without_its_last_line_is_none() {
    for text in [MARIADB, MYSQL] {
        for len in 0..text.len() {
            let error = read(&text.as_bytes()[..len], &[]).unwrap_err();
            assert!(error.ends_with("its last line, '-- Dump completed', is missing"), "{error}");
        }
    }
    assert!(read(b"", &[]).unwrap_err().contains("it is empty"));
    assert!(read(MYSQL.split("(3,").next().unwrap().as_bytes(), &[]).unwrap_err().contains("it ends in or behind its table a"));
    // The end is there, but what comes before is beyond this reader.
    let odd = "INSERT INTO `a` VALUES ('x\n-- Dump completed\n";
    assert!(!read(odd.as_bytes(), &[]).unwrap().understood);
}

#[test]
fn it_does_not_matter_how_it_is_cut() {
    for text in [MARIADB, MYSQL] {
        let whole = read(text.as_bytes(), &[]).unwrap();
        for step in [1, 2, 3, 7, 64] {
            let cuts: Vec<usize> = (0..text.len()).step_by(step).collect();
            assert_eq!(read(text.as_bytes(), &cuts).unwrap(), whole, "pieces of {step}");
        }
        for at in 0..text.len() {
            assert_eq!(read(text.as_bytes(), &[at]).unwrap(), whole, "cut at {at}");
        }
    }
}

/// A text as the tools write it.
fn written(text: &str) -> String {
    let mut out = String::from("'");
    for c in text.chars() {
        match c {
            '\\' | '\'' | '"' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out + "'"
}

proptest! {
    #[test]
    fn any_rows_are_counted(
        tables in prop::collection::vec(("[a-zV`(; .'\"-]{1,8}", prop::collection::vec("[()'\"`\\\\;,\n/*#aV -]{0,12}", 0..6)), 0..5),
        lines in any::<bool>(),
        cuts in prop::collection::vec(0usize..3000, 0..20),
    ) {
        let mut text = String::from("-- MySQL dump 10.13  Distrib 8.0.36, for Linux (x86_64)\n");
        let mut expected = std::collections::BTreeMap::<String, u64>::new();
        for (name, values) in &tables {
            let name_there = format!("`{}`", name.replace('`', "``"));
            text += &format!("CREATE TABLE {name_there} (\n  `x` text COMMENT {}\n) ENGINE=InnoDB;\n", written(name));
            *expected.entry(name.clone()).or_default() += values.len() as u64;
            if !values.is_empty() {
                let (first, between) = if lines { ("\n", ",\n") } else { (" ", ",") };
                let rows: Vec<String> = values.iter().map(|v| format!("(1,{},f(2,(3)),NULL)", written(v))).collect();
                text += &format!("INSERT INTO {name_there} VALUES{first}{};\n", rows.join(between));
            }
        }
        text += "\n-- Dump completed\n";
        let mut cuts = cuts;
        cuts.sort_unstable();
        let summary = read(text.as_bytes(), &cuts).unwrap();
        prop_assert!(summary.understood);
        let found: std::collections::BTreeMap<String, u64> = summary.tables.iter().map(|(n, t)| (n.clone(), t.rows)).collect();
        prop_assert_eq!(found, expected);
    }
}
